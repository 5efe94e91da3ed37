//! The startup parameter `options`: a command line for the server process.
//!
//! Splits it as `pg_split_opts` does and reads the settings out of it, in the three spellings that `postgres` takes.

/// The settings in a startup packet's `options`: `-c name=value`, `-cname=value` and `--name=value`. A backslash takes the
/// next character as it is. Other switches of `postgres`, and settings without a value, are left out.
pub fn parse_options(options: &str) -> Vec<(String, String)> {
    let mut settings = Vec::new();
    let mut words = split(options).into_iter();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("-c") {
            Some("") => words.next(),
            Some(setting) => Some(setting.to_owned()),
            None => word.strip_prefix("--").map(str::to_owned),
        };
        if let Some((name, value)) = setting.as_deref().and_then(|setting| setting.split_once('=')) {
            // ParseLongOption takes dashes for underscores.
            settings.push((name.replace('-', "_"), value.to_owned()));
        }
    }
    settings
}

fn split(options: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = options.chars();
    while let Some(character) = characters.next() {
        match character {
            // C's isspace().
            ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c' => words.extend(word.take()),
            '\\' => word.get_or_insert_default().extend(characters.next()),
            character => word.get_or_insert_default().push(character),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_in_every_spelling() {
        let pairs = |options| -> Vec<String> {
            parse_options(options).into_iter().map(|(name, value)| format!("{name}={value}")).collect()
        };
        assert_eq!(
            pairs("-c statement_timeout=2000 -cdatestyle=iso  --wal-sender-timeout=0s"),
            ["statement_timeout=2000", "datestyle=iso", "wal_sender_timeout=0s"]
        );
        assert_eq!(pairs(r"-c search_path=a\ b\\c -c x="), [r"search_path=a b\c", "x="]);
        assert_eq!(pairs(r"-c geqo -B 5 \"), Vec::<String>::new());
        assert_eq!(pairs(""), Vec::<String>::new());
    }
}
