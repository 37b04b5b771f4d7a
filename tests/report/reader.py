"""Reads pages back."""

from html.parser import HTMLParser


class Reader(HTMLParser):
    """Tables, sources and links of a page, and whether every element is closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str):
        super().__init__()
        self.open = []
        self.tables = []
        self.loaded = []
        self.links = []
        self.ids = []
        self.bold = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.loaded += [values[key] for key in ("src", "srcset", "data", "poster") if key in values]
        self.links += [values["href"]] if tag == "a" else []
        self.ids += [values["id"]] if "id" in values else []
        assert tag not in ("script", "iframe", "object", "link")
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "b" and "td" in self.open:
            self.tables[-1][-1][-1] += "**"

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
