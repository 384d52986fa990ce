"""What a person reads: the HTML page, the terminal table and the progress of a run."""
