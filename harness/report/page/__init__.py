"""The whole of a results folder on one HTML page: tables to sort and filter, figures, and each run's record."""
