"""What travels, read without trust."""
