"""Patterns of what people and models write around an option letter, in the usual languages.

Each has bounded repeats, so that a search takes time linear in the text.
"""

from __future__ import annotations

import re

WORD = r"A-Za-z0-9_\u00aa-\u024f\u0370-\u052f"
OPEN = r"[(\[{<\"'\u201c\u2018\u201e\u00ab\u300c\u300e\u3010\u300a]{0,3} ?"
CLOSE = r"(?: ?[)\]}>\"'\u201d\u2019\u00bb\u300d\u300f\u3011\u300b]{1,3})?"
LETTER = (
    rf"(?<![{WORD}\u00b0&@#])(?<![{WORD}]['\u2019-])[A-Za-z]"
    rf"(?![{WORD}\u00b0&@#]|\+(?! ?[A-Z]\b)|['\u2019][{WORD}]|-[{WORD}]|\.[A-Za-z0-9](?![a-z]))"
)
KIND = (
    r"(?:options?|choices?|letters?|alternatives?|opci[oó]n(?:es)?|lettre|letra|lettera"
    r"|вариант\w{0,2}|选项|選項|選択肢|보기)"
)
BRACKETS = "([{<\u201c\u300c\u3010"
ITEM = rf"(?:(?:the )?{KIND} ?:? ?)?{OPEN}{LETTER}{CLOSE}"
JOIN = (
    r"(?: ?[,;/&|+\u3001] ?(?:\(?(?:and/or|and|or|nor|oder|und|ou|et|o|y|e|или|и) )?"
    r"| \(?(?:and/or|and|or|nor|oder|und|ou|et|o|y|e|или|и|và|hoặc|dan|atau) "
    r"| ?(?:或者|或|和|及|与|または|と|か|또는|와|과) ?)"
    r"(?:also |maybe |perhaps |possibly |even |either )?"
)
GROUP = re.compile(rf"{ITEM}(?:{JOIN}(?:answer )?{ITEM}){{0,25}}", re.IGNORECASE)
ONE = re.compile(LETTER)

FILL = (
    r"(?:[ :=>\"'(\[\u201c]|\b(?:therefore|thus|hence|clearly|simply|most|likely|probably|definitely|indeed"
    r"|actually|not|la|le|el|die|der|das|obviously|certainly|surely|still|then|so|now|really|us|with|не"
    r"|a|o|only|just|in fact|of course|either|both"
    r"|between|an|the|option|choice|letter|answer|statement|number|correct|right|best|one|given by"
    r"|represented by"
    r"|indicated by|label(?:l)?ed|that of|选项|選項|选|選|为)\b ?){0,8}"
)
NOUN = (
    r"(?:\b(?:answer|ans|antwort|respuesta|réponse|risposta|resposta|jawaban(?:nya)?|cevap|odpowiedź"
    r"|ответ|đáp án|solution|conclusion|verdict)\b"
    r"|\b(?:correct|right|best|my|final|true|chosen|proper|appropriate|suitable|valid|accurate|intended)"
    r" (?:best |final )?(?:option|choice|letter|one|statement|selection|pick|response|guess|bet)\b"
    r"|^(?:final|richtig|option|choice|selection|result|prediction|label|pick|letter)(?= ?[:=]| ist\b)"
    r"|\b(?:alternativa|opci[oó]n|op[cç][aã]o|option|opzione) corr\w{2,6}\b|\b(?:the|correct) letter\b"
    r"|答案|答え|正解|正答|答(?=[:\uff1a])"
    r"|정답|답|ค(?:ำ|\u0e4dา)ตอบ"
    r"|الإجابة|الجواب|उत\u094dतर)"
)
IS = (
    r"(?:[:=\u2192\u21d2]|->|=>| ?[-\u2013\u2014](?= |$)|\b(?:is|was|be|are|es|est|ist|è"
    r"|é|lautet|adalah|là)\b"
    r"|['\u2019]s\b"
    r"|是|为|為|應選|应选|选|選|は|은|는|이|ค\u0e37อ|هي"
    r"|هو|ह\u0948)"
)
STATES = re.compile(
    rf"{NOUN}(?P<mid>[^.!?\n]{{0,80}}?){IS}{FILL}$|{NOUN}{FILL}$"
    r"|(?:故|应|應|因此|所以|我)?(?:选择?|選擇?)[: ]{0,2}$",
    re.IGNORECASE,
)
LISTS = re.compile(r"^ ?(?:options|choices|possib\w{1,9}|candidates)\b|\bif\b", re.I)
CHOOSES = re.compile(
    r"(?:\b(?:i|we|i['\u2019](?:d|ll|m)|let me|let['\u2019]s)\b[^,.;!?]{0,30}?|^ ?)\b(?:choos(?:e|ing)"
    r"|chose|pick(?:ed|ing)?|select(?:ed|ing)?"
    r"|go(?:ing)? (?:with|for)|went with|opt(?:ed|ing)? for|settl(?:e|ed|ing) on|answer|vote for|say"
    r"|guess|bet on|lean(?:ing)? towards?)\b"
    rf"{FILL}$",
    re.IGNORECASE,
)
LOOSELY = re.compile(
    r"(?:\b(?:it|this|that|which|what|remains|left|statement|sentence|option|choice|one|item|claim|pair"
    r"|figure|part"
    r"|word|phrase|passage|exception|odd one out)\b[^,.;!?]{0,30}?(?:\b(?:is|must be|has to be|would be"
    r"|should be|can only be)\b|['\u2019]s\b)|\b(?:must be|has to be|leav(?:es|ing)|left with"
    r"|points? to|suggests?"
    r"|indicates?|corresponds? to|match(?:es|ing)?|supports?|no doubt|so|therefore|thus|hence"
    r"|consequently|by (?:process of )?elimination|^yes|^indeed"
    r"|in conclusion|overall|finally|it(?:['\u2019]s|s)|es|es ist|das ist|c['\u2019]est|è|當然是)\b"
    rf"|[\u2192\u21d2\u2234]|->|=>|因此|所以|是)[ ,:]{{0,3}}{FILL}$",
    re.IGNORECASE,
)
REVISION = (
    r"\b(?:no|nope|wait|actually|hm{1,5}|oops|sorry|correction|scratch that|i mean|make that"
    r"|on second thoughts?"
    r"|let me correct|my mistake|i was wrong|rather)\b|不对|等等"
)
REVISES = re.compile(
    rf"(?:^|[.\u2026,;:!?\u2014\u2013-]) {{0,2}}(?:but |or |and )?(?:{REVISION})"
    rf"(?:[ ,.:;!\u2014\u2013-]|{REVISION}|\b(?:it|the answer|that|this|is|should|must|have been|be"
    rf"|option)\b|['\u2019]s)"
    rf"{{0,12}}{FILL}$",
    re.IGNORECASE,
)
STARTS_AGAIN = re.compile(
    rf"^(?:but |and |oh,? )?(?:{REVISION})(?:[ ,.:;!\u2014\u2013-]|$)(?! doubt| matter)", re.IGNORECASE
)
BREAK = re.compile(
    r"[,;:\u2014\u2013\uff0c\u3001]|\b(?:but|so|and|therefore|thus|hence|because|since|as|then|however"
    r"|although|though|yet"
    r"|while|whereas|when|if)\b|但|所以|因此|而",
    re.IGNORECASE,
)
NOT = re.compile(
    r"\b(?:not(?! only)|cannot|never|neither|nor|without|except|excluding|unlike|besides|than"
    r"|instead of|over|versus"
    r"|nicht|kein|isnt|rul(?:e|es|ed|ing)(?: it)? out|eliminat(?:e|es|ed|ing)|exclud\w{0,4}"
    r"|reject\w{0,4}|discard\w{0,4}"
    r"|dismiss\w{0,4}|cross\w{0,3} out|discount\w{0,3}|throw out|не|pas|doubt\w{0,3})\b"
    r"|n['\u2019]t\b|\bno es\b|\bn['\u2019]est\b|\bnon è\b|\bnão é\b"
    r"|不是|不选|不選|排除|不会是|并非|並非",
    re.IGNORECASE,
)
BAD_LABEL = re.compile(
    r"\b(?:wrong|incorrect|false|worst|bad|eliminated?|ruled out|excluded|rejected|discarded|not)\b"
    r"(?:[^,.;!?:=]{0,30}[:=]| (?:answer|option|choice)s? (?:is|are|was|were)\b) ?$"
    r"|\bnot the [^,.;!?]{0,20}: ?$",
    re.IGNORECASE,
)
INSTEAD = re.compile(
    rf"(?:\b(?:but|rather|instead|sondern|sino|mais|а)\b|而?是|ではなく|아니라)"
    rf"(?: rather| instead| it is| it['\u2019]s)?{FILL}$",
    re.IGNORECASE,
)
NO_DOUBT = re.compile(
    r"\b(?:no|without(?: an?y?)?|beyond) doubt\b|\bnot (?:only|surprisingly)\b", re.IGNORECASE
)
ADVERBS = (
    r"(?:(?:both|all|also|not|simply|just|\w{2,20}ly|the|an?|so|too|then|therefore|thus|hence|quite|very) )"
    r"{0,4}"
)
ARE = (
    r"(?:\b(?:is|are|was|were|be|being|seems?|looks?|appears?(?: to be)?|gets?|can|could|may|must"
    r"|should|would|has|have"
    r"|to|been|been|ist|es|est)\b ?|['\u2019]s\b ?)"
)
WRONG = (
    r"(?:wrong|incorrect\w?|false|out|eliminated|ruled out|excluded|rejected|impossible|unlikely"
    r"|invalid|implausible"
    r"|irrelevant|inaccurate|untrue|discarded|distractors?|traps?|falsch|fau(?:x|sse)|невер\w{1,3})\b"
)
SAID_WRONG = re.compile(
    rf"{ARE}{{1,4}}{ADVERBS}{WRONG}|^[ :=\u2014\u2013(-]{{1,4}}{WRONG}"
    rf"|[\u2717\u2718\u274c\u2715\u00d7]|\bfails?\b"
    r"|错误|錯誤|不正确|不对|错|是错",
    re.IGNORECASE,
)
SAID_NOT = re.compile(
    r"^(?: ?\([^()]{0,60}\))?,?(?: (?:which|that))? ?(?:\b(?:is|are|was|were|does|do|did|can|could"
    r"|would|should|will|has"
    r"|have|need)(?:n['\u2019]t\b| not\b| never\b)|\bcannot\b|ではな|가 아니|이 아니)"
    r"(?! (?:only|wrong|incorrect|false|impossible|out))",
    re.IGNORECASE,
)
GOOD = (
    r"(?:correct|right|best|true|final|only|most|likely|appropriate|suitable|accurate|proper|intended"
    r"|valid|closest"
    r"|expected|better|possible|remaining|logical|reasonable|plausible|our|my|the|one|here|scientific)"
)
THE_ANSWER = re.compile(
    rf"^ ?(?:\([^()]{{0,60}}\) ?)?,? ?{ARE}{{1,3}}(?:\w{{2,20}}ly |then |thus |hence |also |still ){{0,2}}"
    rf"(?:(?:{GOOD}) ){{1,5}}(?:answer|choice|option|selection|solution|response|pick)\b"
    r"|^ ?(?:it is|is it)\b|^ ?(?:is|ist|est|es) (?:my|the) (?:final )?answer",
    re.IGNORECASE,
)
RIGHT = re.compile(
    rf"^ ?(?:\([^()]{{0,60}}\) ?)?,? ?{ARE}{{1,3}}(?:\w{{2,20}}ly |then |thus |hence |also |still "
    rf"|the |both )"
    r"{0,3}(?:correct\w?|right|true|best|better|valid|accurate|it|richtig|вер\w{1,3})\b"
    r"|^ ?(?:fits|remains|wins|it is|makes (?:the most |more )?sense)\b|^ ?(?:是)?(?:正确|对)"
    r"|^ ?[\u2713\u2714\u2705]",
    re.IGNORECASE,
)
MAYBE = re.compile(
    r"\b(?:might|may|could|maybe|perhaps|possibly|suppose|assum\w{1,4}|tempt\w{1,4}|initially|at first"
    r"|first thought)\b"
    r"|\b(?:some|many|most|people|students|others|you|someone|one)\b[^,.;!?]{0,30}\b(?:say|think|choose"
    r"|pick|answer"
    r"|guess|argue|believe)\b",
    re.IGNORECASE,
)
WERE = re.compile(r"\b(?:if|unless|had)\b[^.!?]{0,120}\bwould\b", re.IGNORECASE)
UNDECIDED = re.compile(r"\b(?:decide|sure|certain|tell|determine|between|whether|know)\b", re.IGNORECASE)
MUSES = re.compile(
    r"(?:^|\b(?:think|believe|guess|maybe|perhaps|possibly|be|or|surely|suppose|feel|bet|likely"
    r"|probably|between)\b)"
    rf"{FILL}$",
    re.IGNORECASE,
)
THAT_IS_WRONG = re.compile(
    r"^\W{0,3}(?:(?:but|however|yet|no|wait|actually|oh)\b[ ,]{0,2}){0,3}(?:that|this|it)(?:['\u2019]s"
    r"| is| was| would be"
    rf"| can| seems| looks)(?:n['\u2019]t|not)? ?{ADVERBS}(?:{WRONG}|(?:not|be) (?:right|correct|true"
    rf"|it|wrong)\b)",
    re.IGNORECASE,
)
GOES_ON = re.compile(
    r"^(?: ?[).,:;!?\"'\u201d\u2014\u2013-]|$| (?:because|since|as|for|and|or|but|due|which|that|with"
    r"|from|given|by|is|was|not|rather"
    r"|instead|when|where|if|so|according|based|on|in|at|to|thus|hence|therefore|though|although|while"
    r"|after|then"
    r"|here|above|below|the|it|we|they|this|these|would|must|can|cannot|can't|could|should|has|seems"
    r"|fits|remains"
    r"|are|were|isn't|doesn't|does|won't|over|than|wins|makes|only|also)\b| \W)",
    re.IGNORECASE,
)
VERB = re.compile(
    r"^[^,;]{0,40}\b(?:is|are|was|were|would|could|can|cannot|has|have|does|do|will|should|might|may"
    r"|seems?|needs?"
    r"|\w{1,12}n['\u2019]t)\b",
    re.IGNORECASE,
)
OR = re.compile(
    r"\b(?:or|and|oder|ou|as well as)(?: (?:maybe|perhaps|possibly|also|even|the|option|choice"
    r"|else))?[ (]{0,2}$",
    re.I,
)

TEX = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|mbox|emph|underline|bold"
    r"|operatorname|bm)"
    r" {0,3}\{([^{}]{0,300})\}"
)
TAG = re.compile(r"</?(?:[a-z][a-z0-9]{0,15}|[BIPU](?=>[^<>\n]{1,80}</))(?: [^<>\n]{0,60})?/?>")
ANSWER_TAG = re.compile(r"<(answer|final_answer|final|ans)>\s{0,5}([^<>]{1,200}?)\s{0,5}</\1>", re.IGNORECASE)
MARKUP = re.compile(rf"\\[()\[\]]|[*`$~]+|(?<![{WORD}])_+|_+(?![{WORD}])|[\u200b-\u200f\u2060\ufeff]")
NEXT_LINE = re.compile(
    rf"((?:{NOUN})[^.!?\n]{{0,40}}?(?:[:\uff1a]|\bis))\s{{0,3}}\n\s{{0,6}}(?={OPEN}[A-Za-z](?![A-Za-z]))",
    re.IGNORECASE,
)
OR_ELSE = re.compile(
    r"(?<=[A-Z)])(?:\.{1,3}|[,;]) or (?=(?:maybe |perhaps |possibly )?[(\[]?[A-Z]\b)", re.IGNORECASE
)
BOXED = re.compile(r"\\f?boxed ?(?:\{([^{}\n]{0,200})(?:\}|$)|([A-Z])\b)", re.MULTILINE)
BOTH_BOXED = re.compile(r"\} ?(?:,|/|or|and) ?\\boxed ?\{")
HASHES = re.compile(r"^ ?#{3,6} ?([^\n#]{1,200})$", re.MULTILINE)
DOUBLE = re.compile(r"\[\[([A-Za-z])\]\]")
LABEL = re.compile(
    rf"^{OPEN}([A-Za-z])(?:[)\]}}\u3011] ?[.:]?|[.:\u3001](?!\.|[A-Za-z]\.)|(?= [-\u2013\u2014] ))(?= ?\S)"
)
LINE_HEAD = re.compile(r"^(?:[-+\u2022>#\u25cf]{1,6} |\d{1,2}[.)] )")
SENTENCE = re.compile(r"(?<=[.!?\u2026]) |(?<=[\u3002\uff01\uff1f\uff1b])")
RUN_ON = re.compile(r"\n[\s#*]{0,5}(?:Question|Problem|Q|Human|User)(?: ?\d{1,4})?[*\s]{0,3}:", re.IGNORECASE)
ENDS = re.compile(r"[.!?\u2026] |[\n\u3002\uff01\uff1f\uff1b]")
