"""Stage 2: measure a recorded run, as often as one likes. No torch here, ever."""
