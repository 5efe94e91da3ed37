//! Regular expressions, as far as PostgreSQL's and this program's mean the same.
//!
//! Owns the translation: what a pattern has that the engine here does not know, or takes for something else, is refused, so
//! that no pattern lets in whom PostgreSQL would not. The engine needs no more time than text and pattern are long.

use std::fmt;
use std::iter::Peekable;
use std::str::Chars;

/// A compiled pattern.
#[derive(Clone)]
pub struct Regex {
    compiled: ::regex::Regex,
    pattern: String,
    is_certain: bool,
}

/// Why a pattern cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// A bracket that is not closed.
    #[error("brackets [] not balanced")]
    Brackets,
    /// A parenthesis that is not closed, or not opened.
    #[error("parentheses () not balanced")]
    Parentheses,
    /// Nothing that could be repeated.
    #[error("quantifier operand invalid")]
    Quantifier,
    /// A wrong number of repetitions.
    #[error("invalid repetition count(s)")]
    Repetition,
    /// A wrong `[a-b]`.
    #[error("invalid character range")]
    Range,
    /// A wrong `[:name:]`.
    #[error("invalid character class")]
    Class,
    /// A backslash with nothing behind it.
    #[error("invalid escape \\ sequence")]
    Escape,
    /// Something that PostgreSQL knows and that is not known here.
    #[error("{0} not supported here")]
    NotSupported(&'static str),
    /// It would need too much memory.
    #[error("regular expression is too complex")]
    TooComplex,
}

impl Regex {
    /// Compiles a pattern of PostgreSQL's "advanced" kind, as it is without the slash before it.
    pub fn compile(pattern: &str) -> Result<Self, PatternError> {
        if pattern.len() > PATTERN_BYTES_MAX {
            return Err(PatternError::TooComplex);
        }
        let mut translator =
            Translator { rest: pattern.chars().peekable(), out: String::new(), open: 0, is_certain: true };
        translator.translate()?;
        let Translator { out, is_certain, .. } = translator;
        let compiled = ::regex::RegexBuilder::new(&out)
            .dot_matches_new_line(true)
            .size_limit(COMPILED_BYTES_MAX)
            .build()
            .map_err(|_| PatternError::TooComplex)?;
        let is_anchored = pattern.starts_with('^') && out.ends_with('$') && !out.ends_with("\\$");
        Ok(Self { compiled, pattern: pattern.to_owned(), is_certain: is_certain && is_anchored })
    }

    /// Whether it is found anywhere in a text.
    pub fn is_match(&self, text: &str) -> bool {
        self.compiled.is_match(text)
    }

    /// The pattern as it was given.
    pub(super) fn pattern(&self) -> &str {
        &self.pattern
    }

    /// What the first parentheses hold; `None` when it is not found, or they took no part.
    pub(super) fn first_group<'a>(&self, text: &'a str) -> Option<&'a str> {
        self.compiled.captures(text)?.get(1).map(|group| group.as_str())
    }

    pub(super) fn has_group(&self) -> bool {
        self.compiled.captures_len() > 1
    }

    /// Whether there is one way to divide a text among the groups. PostgreSQL takes the longest match, the engine here the
    /// first; the two are the same where all of the text must match and there are neither alternatives nor lazy quantifiers.
    pub(super) fn is_certain_of_groups(&self) -> bool {
        self.is_certain
    }
}

impl fmt::Debug for Regex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.pattern)
    }
}

struct Translator<'a> {
    rest: Peekable<Chars<'a>>,
    out: String,
    /// Parentheses that are open.
    open: usize,
    /// Whether there are neither alternatives nor lazy quantifiers.
    is_certain: bool,
}

/// What was taken last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    /// Something that may be repeated.
    Atom,
    /// Nothing, or what must not be repeated.
    Other,
}

impl Translator<'_> {
    fn translate(&mut self) -> Result<(), PatternError> {
        let mut last = Last::Other;
        // "***:" and "***=" choose another kind of pattern: for anything but the plain kind the first star is misplaced.
        while let Some(c) = self.rest.next() {
            last = match c {
                '*' | '+' | '?' => self.quantifier(c.to_string(), last)?,
                '{' if self.rest.peek().is_some_and(char::is_ascii_digit) => {
                    let bounds = self.bounds()?;
                    self.quantifier(bounds, last)?
                }
                '|' => {
                    self.is_certain = false;
                    self.out.push('|');
                    Last::Other
                }
                '^' | '$' => {
                    self.out.push(c);
                    Last::Other
                }
                '.' => self.atom("."),
                '(' => self.open_group()?,
                ')' => self.close_group()?,
                '[' => self.bracket()?,
                '\\' => self.escape()?,
                c => self.literal(c),
            };
        }
        if self.open > 0 { Err(PatternError::Parentheses) } else { Ok(()) }
    }

    fn atom(&mut self, text: &str) -> Last {
        self.out.push_str(text);
        Last::Atom
    }

    fn literal(&mut self, c: char) -> Last {
        self.out.push_str(&::regex::escape(c.encode_utf8(&mut [0; 4])));
        Last::Atom
    }

    fn quantifier(&mut self, text: String, last: Last) -> Result<Last, PatternError> {
        if last != Last::Atom {
            return Err(PatternError::Quantifier);
        }
        self.out.push_str(&text);
        if self.rest.next_if_eq(&'?').is_some() {
            self.is_certain = false;
            self.out.push('?');
        }
        Ok(Last::Other)
    }

    /// `m}`, `m,}` or `m,n}`, behind the brace.
    fn bounds(&mut self) -> Result<String, PatternError> {
        let mut text = String::from("{");
        for c in self.rest.by_ref() {
            text.push(c);
            if c == '}' {
                break;
            }
        }
        let inside = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        let (least, most) = inside
            .and_then(|inside| {
                let (least, most) = inside.split_once(',').unwrap_or((inside, inside));
                let number = |text: &str| text.parse::<u16>().ok().filter(|count| *count <= REPETITIONS_MAX);
                Some((number(least)?, if most.is_empty() { REPETITIONS_MAX } else { number(most)? }))
            })
            .ok_or(PatternError::Repetition)?;
        if least > most { Err(PatternError::Repetition) } else { Ok(text) }
    }

    fn open_group(&mut self) -> Result<Last, PatternError> {
        self.open += 1;
        self.out.push('(');
        if self.rest.next_if_eq(&'?').is_some() {
            if self.rest.next_if_eq(&':').is_none() {
                return Err(PatternError::NotSupported("look-around constraints and embedded options are"));
            }
            self.out.push_str("?:");
        }
        Ok(Last::Other)
    }

    fn close_group(&mut self) -> Result<Last, PatternError> {
        self.open = self.open.checked_sub(1).ok_or(PatternError::Parentheses)?;
        Ok(self.atom(")"))
    }

    /// What follows a backslash outside of brackets.
    fn escape(&mut self) -> Result<Last, PatternError> {
        let c = self.rest.next().ok_or(PatternError::Escape)?;
        if let Some(set) = class_of(c) {
            let set = format!("[{set}]");
            return Ok(self.atom(&set));
        }
        match c {
            'D' | 'S' | 'W' => {
                let set = class_of(c.to_ascii_lowercase()).unwrap_or_default();
                let set = format!("[^{set}]");
                Ok(self.atom(&set))
            }
            'A' => {
                self.out.push_str("\\A");
                Ok(Last::Other)
            }
            'Z' => {
                self.out.push_str("\\z");
                Ok(Last::Other)
            }
            c if c.is_ascii_alphanumeric() => Err(PatternError::NotSupported("this escape is")),
            c => Ok(self.literal(c)),
        }
    }

    /// A bracket expression, behind its `[`.
    fn bracket(&mut self) -> Result<Last, PatternError> {
        let mut set = String::from("[");
        if self.rest.next_if_eq(&'^').is_some() {
            set.push('^');
        }
        let mut is_first = true;
        loop {
            let c = self.rest.next().ok_or(PatternError::Brackets)?;
            match c {
                ']' if !is_first => break,
                '[' if self.rest.peek().is_some_and(|next| matches!(next, ':' | '.' | '=')) => {
                    set.push_str(&self.named_class()?);
                }
                '\\' => {
                    let escaped = self.rest.next().ok_or(PatternError::Escape)?;
                    match class_of(escaped) {
                        Some(class) => set.push_str(class),
                        None if escaped.is_ascii_alphanumeric() => {
                            return Err(PatternError::NotSupported("this escape in brackets is"));
                        }
                        None => self.range(escaped, &mut set)?,
                    }
                }
                c => self.range(c, &mut set)?,
            }
            is_first = false;
        }
        set.push(']');
        Ok(self.atom(&set))
    }

    /// A character, or all from this one to that behind a `-`.
    fn range(&mut self, from: char, set: &mut String) -> Result<(), PatternError> {
        let put = |set: &mut String, c: char| set.push_str(&format!("\\x{{{:X}}}", u32::from(c)));
        let mut ahead = self.rest.clone();
        let is_range = ahead.next() == Some('-') && ahead.next().is_some_and(|next| next != ']');
        put(set, from);
        if !is_range {
            return Ok(());
        }
        self.rest.next();
        let to = match self.rest.next() {
            Some('\\') => {
                let escaped = self.rest.next().ok_or(PatternError::Escape)?;
                Some(escaped).filter(|escaped| !escaped.is_ascii_alphanumeric())
            }
            Some('[') if self.rest.peek().is_some_and(|next| matches!(next, ':' | '.' | '=')) => None,
            other => other,
        };
        let to = to.filter(|to| *to >= from).ok_or(PatternError::Range)?;
        set.push('-');
        put(set, to);
        Ok(())
    }

    /// `:name:]` behind its `[`.
    fn named_class(&mut self) -> Result<String, PatternError> {
        let mut text = String::from("[");
        for c in self.rest.by_ref() {
            text.push(c);
            if c == ']' {
                break;
            }
        }
        if !text.starts_with("[:") {
            return Err(PatternError::NotSupported("collating elements are"));
        }
        if CLASSES.contains(&text.as_str()) { Ok(text) } else { Err(PatternError::Class) }
    }
}

/// The characters of `\d`, `\s` and `\w`: those of ASCII alone, as in the collation "C".
fn class_of(escape: char) -> Option<&'static str> {
    match escape {
        'd' => Some("0-9"),
        's' => Some(" \\t\\n\\x0B\\x0C\\r"),
        'w' => Some("0-9A-Za-z_"),
        _ => None,
    }
}

const CLASSES: [&str; 12] = [
    "[:alnum:]",
    "[:alpha:]",
    "[:blank:]",
    "[:cntrl:]",
    "[:digit:]",
    "[:graph:]",
    "[:lower:]",
    "[:print:]",
    "[:punct:]",
    "[:space:]",
    "[:upper:]",
    "[:xdigit:]",
];

/// Longest pattern.
const PATTERN_BYTES_MAX: usize = 4096;
/// Memory of a compiled pattern.
const COMPILED_BYTES_MAX: usize = 1 << 20;
/// `DUPMAX` of PostgreSQL's engine.
const REPETITIONS_MAX: u16 = 255;

#[cfg(test)]
mod tests {
    use super::*;

    fn is_match(pattern: &str, text: &str) -> bool {
        Regex::compile(pattern).unwrap().is_match(text)
    }

    #[test]
    fn what_both_understand_matches_as_it_does_there() {
        assert!(is_match("^db[0-9]+$", "db12") && !is_match("^db[0-9]+$", "db"));
        assert!(is_match("a|b", "xbx"), "found anywhere");
        assert!(is_match("^a.b$", "a\nb"), "a newline is a character");
        assert!(!is_match("^a$", "a\n"), "and not the end");
        assert!(is_match("^a{2}$", "aa") && is_match("^a{1,}$", "aaa") && !is_match("^a{1,2}$", "aaa"));
        assert!(is_match("^a{$", "a{"), "a brace before no digit is one");
        assert!(is_match(r"^\w\d\s\D\S\W$", "a1 xy-"));
        assert!(!is_match(r"\w", "\u{e9}") && is_match(r"\W", "\u{e9}"), "letters of ASCII");
        assert!(is_match("^[]a-c^-]+$", "]b^-") && !is_match("^[^]]$", "]"));
        assert!(is_match("^[a&&b]$", "&") && is_match("^[[a]$", "["), "no operations on sets");
        assert!(is_match("^[[:digit:]x]+$", "1x") && is_match(r"^[\d.]+$", "1.2"));
        assert!(is_match(r"^a\.b\/$", "a.b/") && is_match("^(?:ab)+$", "abab"));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (pattern, problem) in [
            ("[a", PatternError::Brackets),
            ("(a", PatternError::Parentheses),
            ("a)", PatternError::Parentheses),
            ("*a", PatternError::Quantifier),
            ("a**", PatternError::Quantifier),
            ("^*", PatternError::Quantifier),
            ("(|*)", PatternError::Quantifier),
            ("***=a", PatternError::Quantifier),
            ("a{256}", PatternError::Repetition),
            ("a{2,1}", PatternError::Repetition),
            ("a{1x}", PatternError::Repetition),
            ("a{1,", PatternError::Repetition),
            ("[b-a]", PatternError::Range),
            ("[[:word:]]", PatternError::Class),
            ("[[=a=]]", PatternError::NotSupported("collating elements are")),
            ("a\\", PatternError::Escape),
            ("(a)\\1", PatternError::NotSupported("this escape is")),
            (r"[\b]", PatternError::NotSupported("this escape in brackets is")),
            ("(?=a)", PatternError::NotSupported("look-around constraints and embedded options are")),
            ("(?i)a", PatternError::NotSupported("look-around constraints and embedded options are")),
            ("(((a{99}){99}){99}){99}", PatternError::TooComplex),
        ] {
            assert_eq!(Regex::compile(pattern).map(|_| ()), Err(problem), "{pattern}");
        }
    }

    #[test]
    fn a_group_is_certain_only_where_both_engines_agree() {
        let certain = |pattern: &str| Regex::compile(pattern).unwrap().is_certain_of_groups();
        assert!(certain(r"^(.*)@example\.com$"));
        for pattern in [r"(.*)@example\.com$", "^(.*)@", "^(a|ab)$", "^(a*?)b$", r"^(a)\$"] {
            assert!(!certain(pattern), "{pattern}");
        }
        let regex = Regex::compile(r"^(.*)@example\.com$").unwrap();
        assert_eq!(regex.first_group("al@ice@example.com"), Some("al@ice"));
        assert_eq!(regex.first_group("alice@example.org"), None);
    }
}
