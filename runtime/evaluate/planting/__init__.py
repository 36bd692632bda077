"""What is planted in ordinary text and asked about: needles, chains of variables, a word that stands most often."""
