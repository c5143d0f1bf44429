SUMMARY = "x"


def configure_parser(p):
    pass


def run(a):
    pass
