"""Data as people have it: files and folders as rows, and rows as questions with answers."""
