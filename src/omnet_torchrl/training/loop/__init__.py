"""The loop that trains, and what it asks: environments, rollouts, evaluation, random streams, stopping."""
