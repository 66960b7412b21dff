"""Write networks to files of another format."""
