"""Read rows from files, and convert rows to conversations."""
