"""Forecasts: fields on a grid, crop yields, crop stress."""
