"""Try many: the study that remembers finished work; it gets what it drives handed in as a function."""
