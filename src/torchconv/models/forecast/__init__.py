"""Forecasts of fields on a grid."""
