"""The words that node, client and workers share. Imports nothing else of this project."""
