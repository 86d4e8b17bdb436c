"""Curves, tables and pictures from stores."""
