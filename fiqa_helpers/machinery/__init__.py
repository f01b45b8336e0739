"""The rooms that no lesson opens: what the notebooks' code needs of a machine, and hides from readers."""
