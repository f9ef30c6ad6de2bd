"""Datasets: one series on one grid (`gridded`) and the windows a model is trained on (`forecast`)."""
