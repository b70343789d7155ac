"""A process: how it starts, prints and ends, and bounds for programs of others."""
