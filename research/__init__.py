"""carousel: why deep and recurrent networks train. Pure functions, models and one trainer; flags live in experiments/."""
