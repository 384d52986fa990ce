"""What to do where: damage per site, and the candidates worth measuring."""
