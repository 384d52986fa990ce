"""What the model is: its sites, their exact costs, the folded norms, the streamed statistics, this machine."""
