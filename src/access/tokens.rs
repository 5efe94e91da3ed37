//! Lines, fields and tokens of `pg_hba.conf` and `pg_ident.conf`.
//!
//! Owns what both have in common (`tokenize_auth_file` of hba.c): comments, quotes, lists, continued lines, and files that
//! are included, whose texts it asks for. Knows no meaning of a field.

use std::{
    io,
    iter::Peekable,
    path::{Path, PathBuf},
    str::Chars,
};

use crate::access::error::{LineError, LineProblem};

/// A word of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    /// Without its quotes.
    pub(super) text: String,
    /// Whether it begins with a quote: then it is a name, and no keyword.
    pub(super) quoted: bool,
}

impl Token {
    pub(super) fn is_keyword(&self, keyword: &str) -> bool {
        !self.quoted && self.text == keyword
    }
}

/// Words with commas between them.
pub(super) type Field = Vec<Token>;

/// A line with something on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) file: PathBuf,
    /// Of the first of its lines, when it is continued.
    pub(super) number: usize,
    /// Never empty, and no field is.
    pub(super) fields: Vec<Field>,
}

impl Line {
    pub(super) fn error(&self, problem: LineProblem) -> LineError {
        LineError { file: self.file.clone(), line: Some(self.number), problem }
    }
}

/// Texts of the files that a text includes.
pub trait IncludedFiles {
    /// The text of a file.
    fn read(&self, path: &Path) -> io::Result<String>;
}

/// There are no files to include.
#[derive(Clone, Copy, Debug)]
pub struct NoFiles;

impl IncludedFiles for NoFiles {
    fn read(&self, _path: &Path) -> io::Result<String> {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// Divides a file's text, and those of the files that it includes.
pub(super) fn tokenize(file: &Path, text: &str, files: &dyn IncludedFiles) -> Result<Vec<Line>, LineError> {
    let mut tokenizer = Tokenizer { files, included: 0, lines: Vec::new() };
    tokenizer.take_text(file, text, 0)?;
    Ok(tokenizer.lines)
}

struct Tokenizer<'a> {
    files: &'a dyn IncludedFiles,
    included: usize,
    lines: Vec<Line>,
}

/// A text that is being read, and how many files it is within.
#[derive(Clone, Copy)]
struct Reading<'a> {
    file: &'a Path,
    line: usize,
    depth: usize,
}

impl Tokenizer<'_> {
    fn take_text(&mut self, file: &Path, text: &str, depth: usize) -> Result<(), LineError> {
        let mut physical = text.lines().enumerate();
        while let Some((index, first)) = physical.next() {
            let mut line = first.trim_end_matches('\r').to_owned();
            // Of two backslashes at the end only the last one continues: what is before it was looked at already.
            let mut looked_at = 0;
            while line.len() > looked_at && line.ends_with('\\') {
                line.pop();
                looked_at = line.len();
                let Some((_, next)) = physical.next() else { break };
                line.push_str(next.trim_end_matches('\r'));
            }
            self.take_line(&line, Reading { file, line: index + 1, depth })?;
        }
        Ok(())
    }

    fn take_line(&mut self, text: &str, reading: Reading<'_>) -> Result<(), LineError> {
        let mut rest = text.chars().peekable();
        let mut fields = Vec::new();
        while rest.peek().is_some() {
            let field = self.next_field(&mut rest, reading)?;
            if !field.is_empty() {
                fields.push(field);
            }
        }
        let words: Vec<_> =
            fields.iter().map(|field| field.first().map_or("", |token| &token.text)).collect();
        match words[..] {
            [] => Ok(()),
            ["include", name] => self.include(name, reading, Missing::IsAnError),
            ["include_if_exists", name] => self.include(name, reading, Missing::IsFine),
            ["include_dir", name] => Err(at(reading, LineProblem::IncludeDirectory(name.to_owned()))),
            _ => {
                self.lines.push(Line { file: reading.file.to_owned(), number: reading.line, fields });
                Ok(())
            }
        }
    }

    /// One field: words with commas behind all but the last.
    fn next_field(
        &mut self,
        rest: &mut Peekable<Chars<'_>>,
        reading: Reading<'_>,
    ) -> Result<Field, LineError> {
        let mut field = Field::new();
        while let Some((token, ends_with_comma)) = next_token(rest) {
            match token.text.strip_prefix('@').filter(|name| !token.quoted && !name.is_empty()) {
                Some(name) => field.extend(self.words_of(name, reading)?),
                None => field.push(token),
            }
            if !ends_with_comma {
                break;
            }
        }
        Ok(field)
    }

    /// `@file`: every word in it, wherever it stands.
    fn words_of(&mut self, name: &str, reading: Reading<'_>) -> Result<Field, LineError> {
        let (path, text) = self.open(name, reading)?;
        let mut inner = Tokenizer { files: self.files, included: self.included, lines: Vec::new() };
        inner.take_text(&path, &text, reading.depth + 1)?;
        self.included = inner.included;
        Ok(inner.lines.into_iter().flat_map(|line| line.fields).flatten().collect())
    }

    fn include(&mut self, name: &str, reading: Reading<'_>, missing: Missing) -> Result<(), LineError> {
        let (path, text) = match self.open(name, reading) {
            Err(LineError { problem: LineProblem::Include { reason, .. }, .. })
                if missing == Missing::IsFine && reason == NO_SUCH_FILE =>
            {
                return Ok(());
            }
            opened => opened?,
        };
        self.take_text(&path, &text, reading.depth + 1)
    }

    /// A name is relative to the file that it stands in.
    fn open(&mut self, name: &str, reading: Reading<'_>) -> Result<(PathBuf, String), LineError> {
        let path = reading.file.parent().unwrap_or(Path::new("")).join(name);
        let failed = |reason: String| at(reading, LineProblem::Include { file: path.clone(), reason });
        if reading.depth >= INCLUDE_DEPTH_MAX {
            return Err(failed("maximum nesting depth exceeded".to_owned()));
        }
        self.included += 1;
        if self.included > INCLUDED_FILES_MAX {
            return Err(failed(format!("more than {INCLUDED_FILES_MAX} files are included")));
        }
        let text = self.files.read(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => failed(NO_SUCH_FILE.to_owned()),
            _ => failed(error.to_string()),
        })?;
        Ok((path, text))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    IsAnError,
    IsFine,
}

fn at(reading: Reading<'_>, problem: LineProblem) -> LineError {
    LineError { file: reading.file.to_owned(), line: Some(reading.line), problem }
}

/// The next word, and whether a comma follows it (`next_token`). A quote may begin in the middle of a word, too; one that
/// does not end goes on to the end of the line.
fn next_token(rest: &mut Peekable<Chars<'_>>) -> Option<(Token, bool)> {
    while rest.next_if(|c| is_blank(*c) || *c == ',').is_some() {}
    let (mut text, mut quoted) = (String::new(), false);
    let (mut in_quotes, mut was_quote, mut has_quotes, mut ends_with_comma) = (false, false, false, false);
    while let Some(&c) = rest.peek() {
        if !in_quotes && is_blank(c) {
            break;
        }
        if !in_quotes && c == '#' {
            rest.by_ref().for_each(drop);
            break;
        }
        if !in_quotes && c == ',' {
            ends_with_comma = true;
            break;
        }
        rest.next();
        if c != '"' || was_quote {
            text.push(c);
        }
        // Two quotes within quotes are one.
        was_quote = in_quotes && c == '"' && !was_quote;
        if c == '"' {
            in_quotes = !in_quotes;
            has_quotes = true;
            quoted |= text.is_empty();
        }
    }
    (has_quotes || !text.is_empty()).then_some((Token { text, quoted }, ends_with_comma))
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r')
}

/// How deep files may be included in each other (`CONF_FILE_MAX_DEPTH`).
pub const INCLUDE_DEPTH_MAX: usize = 10;
/// Files that may be included in all: one that includes itself twice would otherwise be read a thousand times.
const INCLUDED_FILES_MAX: usize = 100;

const NO_SUCH_FILE: &str = "No such file or directory";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    struct Folder(BTreeMap<&'static str, &'static str>);

    impl IncludedFiles for Folder {
        fn read(&self, path: &Path) -> io::Result<String> {
            let text = self.0.get(path.to_str().unwrap());
            text.map(|text| (*text).to_owned()).ok_or_else(|| io::ErrorKind::NotFound.into())
        }
    }

    /// Every line as text: fields with blanks between, words with commas, what was quoted in quotes.
    fn shown(text: &str, files: &dyn IncludedFiles) -> Result<Vec<String>, String> {
        let word = |token: &Token| {
            if token.quoted { format!("<{}>", token.text) } else { token.text.clone() }
        };
        let field = |field: &Field| field.iter().map(word).collect::<Vec<_>>().join(",");
        let line = |line: &Line| {
            let fields = line.fields.iter().map(field).collect::<Vec<_>>().join(" ");
            format!("{}: {fields}", line.number)
        };
        match tokenize(Path::new("/etc/hba"), text, files) {
            Ok(lines) => Ok(lines.iter().map(line).collect()),
            Err(error) => {
                Err(format!("{}:{}: {}", error.file.display(), error.line.unwrap_or(0), error.problem))
            }
        }
    }

    fn alone(text: &str) -> Vec<String> {
        shown(text, &NoFiles).unwrap()
    }

    #[test]
    fn blanks_commas_comments_and_quotes_divide_a_line() {
        assert_eq!(alone("a b\tc,d , e # f\n\n  # all comment\ng"), ["1: a b c,d e", "4: g"]);
        assert_eq!(alone("\"a b\",\"all\" c\"d e\"f"), ["1: <a b>,<all> cd ef"]);
        assert_eq!(alone("\"a\"\"b\" \"\" \"#x\" y#z"), ["1: <a\"b> <> <#x> y"]);
        assert_eq!(alone("a, # b\n,c"), ["1: a", "2: c"]);
        assert_eq!(alone("\"never ends # b"), ["1: <never ends # b>"]);
        assert_eq!(alone("a b\r\nc\r\n"), ["1: a b", "2: c"]);
    }

    #[test]
    fn a_backslash_at_the_end_continues_a_line_which_keeps_its_first_number() {
        assert_eq!(alone("a \\\n b\nc"), ["1: a b", "3: c"]);
        assert_eq!(alone("# comment \\\nstill\nc"), ["3: c"]);
        assert_eq!(alone("a\\\nb\\\nc d"), ["1: abc d"]);
        assert_eq!(alone("a\\"), ["1: a"]);
        assert_eq!(alone("a \\\n\\\nb"), ["1: a b"]);
        assert_eq!(alone("a\\\\\n\nb"), ["1: a\\", "3: b"]);
    }

    #[test]
    fn files_are_included_relative_to_the_one_they_stand_in() {
        let folder = Folder(BTreeMap::from([
            ("/etc/names", "x, y\nz # and\n\"all\"\n"),
            ("/etc/more/lines", "l1 @../names\nl2"),
            ("/etc/more/../names", "q"),
        ]));
        let of = |text: &str| shown(text, &folder).unwrap();
        assert_eq!(of("a b,@names c"), ["1: a b,x,y,z,<all> c"]);
        assert_eq!(of("\"@names\" @"), ["1: <@names> @"]);
        assert_eq!(of("@\"names\""), ["1: x,y,z,<all>"]);
        assert_eq!(of("a\ninclude more/lines\nb"), ["1: a", "1: l1 q", "2: l2", "3: b"]);
        assert_eq!(of("include_if_exists none\nb"), ["2: b"]);
        let error = |text: &str| shown(text, &folder).unwrap_err();
        assert_eq!(
            error("\ninclude none"),
            "/etc/hba:2: could not open file \"/etc/none\": No such file or directory"
        );
        assert_eq!(
            error("a @none"),
            "/etc/hba:1: could not open file \"/etc/none\": No such file or directory"
        );
        assert_eq!(
            error("include_dir d"),
            "/etc/hba:1: include_dir is not supported: name the files of \"d\" with include"
        );
    }

    #[test]
    fn files_that_include_themselves_are_noticed() {
        let folder = Folder(BTreeMap::from([("/etc/hba", "include hba"), ("/etc/twice", "@twice @twice")]));
        let error = shown("include hba", &folder).unwrap_err();
        assert!(error.ends_with("maximum nesting depth exceeded"), "{error}");
        let error = shown("x @twice", &folder).unwrap_err();
        assert!(error.contains("maximum nesting depth") || error.contains("more than 100 files"), "{error}");
    }
}
