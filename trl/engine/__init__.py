"""A model and a batch in, numbers per trained token out. Nothing here knows a loss."""
