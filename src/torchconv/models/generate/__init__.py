"""Networks that generate images, and how their predictions are guided."""
