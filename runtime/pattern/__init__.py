"""What a layer's attention attends and how its scores become weights: selectors, rules by layer, windows, sinks."""
