"""How models are judged: scores, protocols, sliding windows, corruptions."""
