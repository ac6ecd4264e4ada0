"""SmoothQuant, and where the neighbours of a layer can take a factor."""
