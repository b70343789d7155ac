"""Start, print and end as a process, and run third-party programs within bounds."""
