"""Start launchers on other hosts by SSH or Ray."""
