"""What a machine offers and what a recipe costs, known before anything is spent. `environment.py` is the machine's side."""
