"""Data sets and plans as text for a terminal and as HTML pages."""
