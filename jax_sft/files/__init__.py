"""Files and folders of a run: safe to write, safe to read and safe to replace."""
