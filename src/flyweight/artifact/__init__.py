"""What goes out: the artifact folder, its verified read and its atomic write; format.py tells the format."""
