def environment():
    return {}


def start_lifeline():
    pass
