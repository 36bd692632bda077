"""Drawings of the pages: masks, loads, timelines, training, fidelity; and the colours that all of them share."""
