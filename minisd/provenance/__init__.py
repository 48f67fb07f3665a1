"""How a picture was made: what goes into its PNG, so that it can be made again."""
