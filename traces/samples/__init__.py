"""Small traces that come with the package: `sample:real-135m` names one wherever a trace folder is asked for."""
