"""What comes in, checked once at the border."""
