"""What ``benchmarks/science.py`` measures, a file for each question."""
