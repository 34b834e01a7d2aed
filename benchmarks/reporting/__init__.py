"""What becomes of a run: tables, sentences, pictures, and the comparison of two runs, all from its document."""
