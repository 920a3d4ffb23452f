"""Networks that find objects, and what turns their outputs into boxes."""
