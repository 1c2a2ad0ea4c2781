"""HTML, reStructuredText and source files -> clean text: no navigation, no directives of a documentation tool, no licence headers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

EMAIL = re.compile(r"<?[\w.+-]+@[\w-]+\.[\w.-]+>?")
BLOCKS = {"p", "div", "li", "ul", "ol", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "blockquote", "section", "article", "br"}
SKIPPED = {"script", "style", "head", "table", "form", "nav", "svg", "button"}
SKIPPED_CLASSES = {"nosearch", "navheader", "navfooter", "menu", "fancy_title", "toc", "fancy-toc1", "fancy-toc2", "fancy-toc3", "footnotes"}
VOID = {"br", "hr", "img", "input", "link", "meta", "col"}


class _Text(HTMLParser):
    """Collects text; `skip` counts open elements inside a skipped one."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.stack: list[tuple[str, bool]] = []
        self.pre = 0

    @property
    def is_skipped(self) -> bool:
        return bool(self.stack) and self.stack[-1][1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "li", "dt", "dd"):  # HTML lets these end without an end tag
            while self.stack and self.stack[-1][0] == tag:
                self.stack.pop()
        if tag in VOID:
            self.parts.append("\n" if tag == "br" else "")
            return
        classes = set((dict(attrs).get("class") or "").split()) | {dict(attrs).get("id") or ""}
        self.stack.append((tag, self.is_skipped or tag in SKIPPED or bool(classes & SKIPPED_CLASSES)))
        if self.is_skipped:
            return
        if tag == "pre":
            self.pre += 1
            self.parts.append("\n\n```\n")
        elif tag in ("h1", "h2", "h3", "h4"):
            self.parts.append("\n\n" + "#" * int(tag[1]) + " ")
        elif tag == "li":
            self.parts.append("\n\n- ")
        elif tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag not in {name for name, _ in self.stack}:
            return
        while self.stack:
            name, was_skipped = self.stack.pop()
            if name == "pre" and not was_skipped:
                self.pre -= 1
                self.parts.append("\n```\n\n")
            if name == tag:
                break
        if tag in BLOCKS and not self.is_skipped:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.is_skipped:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def from_html(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    text = "".join(parser.parts).replace("\xa0", " ")
    text = re.sub(r"^- \s*\n+", "- ", text, flags=re.M)
    text = re.sub(r"^(#+) (\d+\.)+ *", r"\1 ", text, flags=re.M)
    parts = text.split("```")
    parts[::2] = (re.sub(r"(?m)^[ \t]+", "", part) for part in parts[::2])
    parts[1::2] = ("\n" + part.strip("\n") + "\n" for part in parts[1::2])
    return tidy("```".join(parts))


ADORNMENT = re.compile(r"^([=\-~^*\"'`#+.])\1{2,}\s*$")
ROLE = re.compile(r":[\w:+.-]+:`([^`]*)`")
LITERAL = re.compile(r"^\s*\.\. (code-block|code|sourcecode|math)\s*::\s*(\S*)")
DROPPED = re.compile(r"^\s*\.\. (?!code|sourcecode|note|warning|tip|important|admonition|math|function|method|class|attribute|data|exception)")


def from_rst(text: str) -> str:
    """reStructuredText -> Markdown-like text: headings, code fences, roles as their words; other directives go."""
    text = re.sub(r"\.\. only::.*\n|\.\. contents::.*\n(?:[ \t]+:.*\n)*", "", text)
    text = ROLE.sub(lambda m: "`" + re.sub(r"\s*<[^>]*>$", "", m[1]).lstrip("~!.").split("/")[-1] + "`", text)
    text = re.sub(r"`([^`<]+?)\s*<[^>`]+>`__?", r"\1", text)
    text = re.sub(r"\[(\d+|#\w*)\]_", "", text).replace("``", "`")
    lines = text.split("\n")
    out: list[str] = []
    levels: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        following = lines[i + 1] if i + 1 < len(lines) else ""
        if ADORNMENT.match(line) and ADORNMENT.match(lines[i + 2] if i + 2 < len(lines) else "") and following.strip():
            out.append(_heading("over" + line[0], levels) + following.strip())
            i += 3
        elif line.strip() and not line.startswith(" ") and ADORNMENT.match(following) and len(following.rstrip()) >= len(line.rstrip()) - 1:
            out.append(_heading(following[0], levels) + line.strip())
            i += 2
        elif DROPPED.match(line):
            i = _block_end(lines, i + 1, _indent(line) + 1)
        elif LITERAL.match(line) or (line.rstrip().endswith("::") and not line.lstrip().startswith("..")):
            i = _literal(lines, i, out)
        elif directive := re.match(r"^(\s*)\.\. ([\w-]+):: ?(.*)$", line):
            kind, rest = directive[2], directive[3]
            is_signature = kind in ("function", "method", "class", "attribute", "data", "exception")
            out.append(f"{directive[1]}`{rest}`" if is_signature else f"{directive[1]}{kind.capitalize()}: {rest}".rstrip())
            i += 1
        elif re.match(r"^\s+:[\w-]+:(\s|$)", line) and out and not out[-1].strip():
            i += 1
        else:
            out.append(line)
            i += 1
    return tidy("\n".join(out))


def _heading(mark: str, levels: list[str]) -> str:
    if mark not in levels:
        levels.append(mark)
    return "#" * (levels.index(mark) + 1) + " "


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _block_end(lines: list[str], start: int, indent: int) -> int:
    end = start
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) >= indent):
        end += 1
    return end


def _literal(lines: list[str], i: int, out: list[str]) -> int:
    """A literal block as a fenced one; returns the line behind it."""
    line, indent = lines[i], _indent(lines[i])
    language = ""
    if marked := LITERAL.match(line):
        language = "math" if marked[1] == "math" else marked[2]
    elif line.strip() != "::":
        out.append(line.rstrip()[:-1])
    end = _block_end(lines, i + 1, indent + 1)
    body = [row for row in lines[i + 1 : end] if not re.match(r"^\s+:[\w-]+:", row)]
    while body and not body[0].strip():
        body.pop(0)
    while body and not body[-1].strip():
        body.pop()
    if body:
        cut = min(_indent(row) for row in body if row.strip())
        pad = " " * indent
        out += ["", f"{pad}```{language}", *(pad + row[cut:] if row.strip() else "" for row in body), f"{pad}```", ""]
    return end


def from_source(text: str) -> str:
    """A source file without the licence comment at its head (which the notices beside the mix keep) and without addresses."""
    head = re.match(r"\s*(?:/\*.*?\*/\s*|(?://[^\n]*\n)+|(?:#[^\n]*\n)+)", text, flags=re.S)
    while head and re.search(r"copyright|licen[sc]e|@fileoverview|@author", head[0], flags=re.I):
        text = text[head.end() :]
        head = re.match(r"\s*(?:/\*.*?\*/\s*|(?://[^\n]*\n)+|(?:#[^\n]*\n)+)", text, flags=re.S)
    lines = [line for line in text.split("\n") if not re.search(r"@author|copyright \(c\)|^# Author|__author__", line, flags=re.I)]
    return tidy("\n".join(lines))


def tidy(text: str) -> str:
    text = EMAIL.sub("user@example.com", text.replace("\r\n", "\n"))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return re.sub(r"\n+#+ (References|See Also)$", "", text) + "\n"


def pieces(text: str, size: int) -> Iterator[str]:
    """Parts of about `size` characters, cut where a paragraph ends outside a code fence."""
    part: list[str] = []
    length = fences = 0
    for paragraph in text.split("\n\n"):
        part.append(paragraph)
        length += len(paragraph) + 2
        fences += paragraph.count("```")
        if length >= size and fences % 2 == 0:
            yield "\n\n".join(part).strip("\n") + "\n"
            part, length = [], 0
    if "".join(part).strip():
        yield "\n\n".join(part).strip("\n") + "\n"
