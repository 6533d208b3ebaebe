def papers():
    return lambda page: ""
