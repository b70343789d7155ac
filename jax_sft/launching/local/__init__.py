"""Processes of one host: started, watched, stopped and started again."""
