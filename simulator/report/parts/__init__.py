"""The parts of a report: each function returns what one part of the page shows, or None where there is no data."""
