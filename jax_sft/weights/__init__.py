"""Parameters and Hugging Face folders: tensor names, reading and writing."""
