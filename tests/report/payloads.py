"""Sixty texts that would run or load something in a page that did not escape them, and five such images."""

import base64

_NOWHERE = "http://127.0.0.1:9"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" onload="parent.PWN=1;top.PWN=1">'
    f'<script>top.PWN=1;fetch("{_NOWHERE}/svg")</script><image href="{_NOWHERE}/img"/>'
    '<foreignObject><iframe src="javascript:top.PWN=1"/></foreignObject></svg>'
)
_SCRIPT = "<script>PWN=1</script>"
_ELEMENTS = [
    "img src=x onerror=PWN=1",
    "svg onload=PWN=1",
    "iframe src=javascript:parent.PWN=1",
    "object data=javascript:PWN=1",
    "embed src=javascript:PWN=1",
    "a href=javascript:PWN=1 autofocus onfocus=PWN=1",
    "form action=javascript:PWN=1 onmouseover=PWN=1",
    "button formaction=javascript:PWN=1 onclick=PWN=1",
    "details open ontoggle=PWN=1",
    "audio src=x onerror=PWN=1",
    "body onload=PWN=1",
    "marquee onstart=PWN=1",
    "input autofocus onfocus=PWN=1",
    "select autofocus onfocus=PWN=1",
    "textarea autofocus onfocus=PWN=1",
    "meta http-equiv=refresh content='0;url=javascript:PWN=1'",
    f"meta http-equiv=refresh content='0;url={_NOWHERE}/refresh'",
    f"link rel=stylesheet href={_NOWHERE}/css",
    f"link rel=prefetch href={_NOWHERE}/pre",
    f"base href={_NOWHERE}/",
    f"div style=background:url({_NOWHERE}/b)",
    "x onclick=PWN=1 tabindex=1 autofocus onfocus=PWN=1",
    f"script src={_NOWHERE}/x.js",
    "isindex action=javascript:PWN=1",
]
_ENDS = [">", "'>", '">', "</title>", "</style>", "</script>", "</textarea>", "</noscript>", "-->", "]]>", "</svg>"]
_OTHERS = [
    "</blockquote></li></ol></section>" + _SCRIPT,
    "<iframe srcdoc='<script>parent.PWN=1</script>'>",
    "<svg>" + _SCRIPT + "</svg>",
    f"<style>@import '{_NOWHERE}/s'</style>",
    f"<script type=module>import('{_NOWHERE}/m')</script>",
    "<video><source onerror=PWN=1>",
    "<math><mtext><table><mglyph><style><img src=x onerror=PWN=1>",
    "<template>" + _SCRIPT + "</template>",
    "<noscript><p title='</noscript><img src=x onerror=PWN=1>'>",
    "<!--><img src=x onerror=PWN=1>-->",
    "<![CDATA[" + _SCRIPT + "]]>",
    "<%00script>PWN=1</script>",
    "<scr\x00ipt>PWN=1</scr\x00ipt>",
    '\x00"><img src=x onerror=PWN=1>',
    "+ADw-script+AD4-PWN=1+ADw-/script+AD4-",
    "\u2028" + _SCRIPT,
    "＜script＞PWN=1＜/script＞",
    "&lt;script&gt;PWN=1&lt;/script&gt;",
    "&#60;script&#62;PWN=1&#60;/script&#62;",
    "{{ 7*7 }}{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
    "' onmouseover='PWN=1",
    '" onmouseover="PWN=1" x="',
    "\x1b]8;;http://evil\x07x\x1b]8;;\x07\ud800" + _SCRIPT,
    "<img src='data:image/svg+xml," + SVG.replace("'", "%27") + "'>",
]
TEXTS = [f"<{element}>" for element in _ELEMENTS] + [end + _SCRIPT for end in _ENDS] + _OTHERS
IMAGES = [
    "data:image/svg+xml," + SVG,
    "data:image/svg+xml;base64," + base64.b64encode(SVG.encode()).decode(),
    'data:image/png;base64,iVBOR" onerror="PWN=1',
    f'data:image/x" onload=PWN=1 src="{_NOWHERE}/',
    "data:image/png,x'onerror='PWN=1",
]
assert len(TEXTS) == 60
