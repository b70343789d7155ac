"""Parameters and Hugging Face folders: the name of each tensor, and the way in and out."""
