//! `pg_hba.conf` against a simple model: rules that are made up as values, written down in one of the many ways that they can
//! be written in, read again, and asked about clients.
//!
//! The model compares names as names and addresses as rows of bits. It shares nothing with `src/access` but its types.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "clippy exempts test functions, not their helpers"
)]

use std::net::IpAddr;
use std::path::Path;

use proptest::{collection::vec, prelude::*, sample::select};
use walrelay::access::{Applicant, Interface, NoFiles, Origin, Rules, UserMaps, Wire};
use walrelay::protocol::frontend::ReplicationMode;

/// A word of a list, as it is meant.
#[derive(Clone, Debug, PartialEq)]
enum Word {
    Keyword(&'static str),
    Name(&'static str),
}

#[derive(Clone, Debug)]
enum Network {
    All,
    SameHost,
    SameNet,
    /// An address, and how many of its bits count.
    Prefix(IpAddr, usize),
}

#[derive(Clone, Debug)]
struct Line {
    kind: &'static str,
    databases: Vec<Word>,
    users: Vec<Word>,
    network: Network,
    method: &'static str,
}

#[derive(Clone, Debug)]
struct Client {
    address: Option<IpAddr>,
    tls: bool,
    mode: ReplicationMode,
    database: &'static str,
    user: &'static str,
}

/// Few, so that rules and clients meet. Some look like keywords.
const NAMES: [&str; 6] = ["a", "b", "all", "replication", "two words", "sa\"me,#"];
const ADDRESSES: [&str; 9] = [
    "10.0.0.1",
    "10.0.0.2",
    "10.0.128.1",
    "127.0.0.1",
    "192.168.7.9",
    "::1",
    "2001:db8::1",
    "2001:db8:8000::1",
    "fe80::1",
];

fn interfaces() -> Vec<Interface> {
    [("127.0.0.1", "255.0.0.0"), ("10.0.0.1", "255.255.128.0"), ("2001:db8::1", "ffff:ffff:8000::")]
        .map(|(address, mask)| Interface { address: address.parse().unwrap(), mask: mask.parse().unwrap() })
        .to_vec()
}

fn address() -> impl Strategy<Value = IpAddr> {
    select(&ADDRESSES[..]).prop_map(|text| text.parse().unwrap())
}

fn words(keywords: &'static [&'static str]) -> impl Strategy<Value = Vec<Word>> {
    let word = prop_oneof![
        select(keywords).prop_map(Word::Keyword),
        select(&NAMES[..]).prop_map(Word::Name),
        select(&NAMES[..2]).prop_map(Word::Name),
    ];
    vec(word, 1..4)
}

fn network() -> impl Strategy<Value = Network> {
    prop_oneof![
        Just(Network::All),
        Just(Network::SameHost),
        Just(Network::SameNet),
        (address(), 0..=128_usize).prop_map(|(address, bits)| {
            Network::Prefix(address, bits % (if address.is_ipv4() { 33 } else { 129 }))
        }),
    ]
}

fn line() -> impl Strategy<Value = Line> {
    let kinds = select(&["local", "host", "host", "hostssl", "hostnossl", "hostgssenc", "hostnogssenc"][..]);
    let methods = select(&["trust", "reject", "scram-sha-256", "md5"][..]);
    (kinds, words(&["all", "replication", "sameuser"]), words(&["all"]), network(), methods).prop_map(
        |(kind, databases, users, network, method)| Line { kind, databases, users, network, method },
    )
}

fn client() -> impl Strategy<Value = Client> {
    let modes = select(&[ReplicationMode::Physical, ReplicationMode::Database, ReplicationMode::Off][..]);
    (proptest::option::weighted(0.8, address()), any::<bool>(), modes, select(&NAMES[..]), select(&NAMES[..]))
        .prop_map(|(address, tls, mode, database, user)| Client { address, tls, mode, database, user })
}

/// What is free in how a line is written.
#[derive(Clone, Debug)]
struct Hand {
    blanks: Vec<&'static str>,
    quote_all: bool,
    mask_apart: bool,
    comment: bool,
    comma: &'static str,
}

fn hand() -> impl Strategy<Value = Hand> {
    let blanks = vec(select(&[" ", "\t", "   ", " \\\n  ", "\t \r "][..]), 8);
    let commas = select(&[",", ", ", ",\t", ",,"][..]);
    (blanks, any::<bool>(), any::<bool>(), any::<bool>(), commas).prop_map(
        |(blanks, quote_all, mask_apart, comment, comma)| Hand {
            blanks,
            quote_all,
            mask_apart,
            comment,
            comma,
        },
    )
}

impl Hand {
    fn write(&self, line: &Line) -> String {
        let list =
            |words: &[Word]| words.iter().map(|word| self.word(word)).collect::<Vec<_>>().join(self.comma);
        let mut fields = vec![line.kind.to_owned(), list(&line.databases), list(&line.users)];
        match &line.network {
            _ if line.kind == "local" => {}
            Network::All => fields.push("all".to_owned()),
            Network::SameHost => fields.push("samehost".to_owned()),
            Network::SameNet => fields.push("samenet".to_owned()),
            Network::Prefix(address, bits) if self.mask_apart => {
                fields.extend([address.to_string(), mask(*address, *bits).to_string()]);
            }
            Network::Prefix(address, bits) => fields.push(format!("{address}/{bits}")),
        }
        fields.push(line.method.to_owned());
        let mut text = String::new();
        for (field, blank) in fields.iter().zip(self.blanks.iter().cycle()) {
            text.push_str(field);
            text.push_str(blank);
        }
        if self.comment { text + "# host all all all trust\n" } else { text + "\n" }
    }

    /// A name that is, or could be taken for, something else must stand in quotes.
    fn word(&self, word: &Word) -> String {
        match word {
            Word::Keyword(keyword) => (*keyword).to_owned(),
            Word::Name(name) if self.quote_all || !["a", "b"].contains(name) => {
                format!("\"{}\"", name.replace('"', "\"\""))
            }
            Word::Name(name) => (*name).to_owned(),
        }
    }
}

fn mask(address: IpAddr, bits: usize) -> IpAddr {
    let byte = |at: usize| (0..8).fold(0, |sum, bit| sum << 1 | u8::from(at * 8 + bit < bits));
    match address {
        IpAddr::V4(_) => IpAddr::from(std::array::from_fn::<u8, 4, _>(byte)),
        IpAddr::V6(_) => IpAddr::from(std::array::from_fn::<u8, 16, _>(byte)),
    }
}

fn bits(address: IpAddr) -> String {
    let bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    bytes.iter().map(|byte| format!("{byte:08b}")).collect()
}

fn starts_alike(left: IpAddr, right: IpAddr, count: usize) -> bool {
    left.is_ipv4() == right.is_ipv4() && bits(left)[..count] == bits(right)[..count]
}

/// The model.
fn is_meant(line: &Line, client: &Client) -> bool {
    let is_kind = match (line.kind, client.address) {
        ("local", address) => address.is_none(),
        (_, None) | ("hostgssenc", _) => false,
        ("hostssl", _) => client.tls,
        ("hostnossl", _) => !client.tls,
        _ => true,
    };
    let is_there = match (&line.network, client.address) {
        (_, None) | (Network::All, _) => true,
        (Network::Prefix(network, count), Some(address)) => starts_alike(*network, address, *count),
        (Network::SameHost, Some(address)) => interfaces().iter().any(|one| one.address == address),
        (Network::SameNet, Some(address)) => interfaces()
            .iter()
            .any(|one| starts_alike(one.address, address, bits(one.mask).trim_end_matches('0').len())),
    };
    let is_database = line.databases.iter().any(|word| match (client.mode, word) {
        (ReplicationMode::Physical, word) => *word == Word::Keyword("replication"),
        (_, Word::Keyword("all")) => true,
        (_, Word::Keyword("sameuser")) => client.database == client.user,
        (_, Word::Keyword(_)) => false,
        (_, Word::Name(name)) => *name == client.database,
    });
    let is_user = line.users.iter().any(|word| match word {
        Word::Keyword(_) => true,
        Word::Name(name) => *name == client.user,
    });
    is_kind && is_there && is_database && is_user
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn however_rules_are_written_the_first_that_is_meant_holds(
        lines in vec((line(), hand()), 1..8),
        clients in vec(client(), 8),
    ) {
        let text: String = lines.iter().map(|(line, hand)| hand.write(line)).collect();
        let rules = Rules::parse(Path::new("hba"), &text, &NoFiles)
            .unwrap_or_else(|error| panic!("{text}\n{error:?}"));
        prop_assert_eq!(rules.iter().count(), lines.len());
        for client in clients {
            let applicant = Applicant {
                origin: client.address.map_or(Origin::Local, Origin::Tcp),
                wire: if client.tls { Wire::Tls } else { Wire::Clear },
                mode: client.mode,
                database: client.database,
                user: client.user,
            };
            let expected = lines.iter().position(|(line, _)| is_meant(line, &client));
            let found = rules.find(&applicant, None, &interfaces);
            let position = found.and_then(|found| rules.iter().position(|rule| std::ptr::eq(rule, found)));
            prop_assert_eq!(position, expected, "{:?}\n{}", client, text);
            let method = found.map(|rule| rule.method.as_str());
            prop_assert_eq!(method, expected.map(|at| lines[at].0.method));
        }
    }

    #[test]
    fn no_text_is_too_strange_to_be_read_or_refused(text in "(?s).{0,200}") {
        for text in [text.clone(), text.replace(|c: char| !c.is_ascii_graphic(), " host all ")] {
            let _ = Rules::parse(Path::new("hba"), &text, &NoFiles);
            let _ = UserMaps::parse(Path::new("ident"), &text, &NoFiles);
        }
    }
}
