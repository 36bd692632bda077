"""Is a model right when its sequence is split over ranks?"""
