//! Result sets: columns and rows in text format.
//!
//! Owns the few types that replication commands answer with. Values are bytes; what they mean is the command's matter.

use bytes::{BufMut, Bytes, BytesMut};

use crate::protocol::DecodeError;
use crate::protocol::fields::{Fields, put_text};

/// A column of a result set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// The table it comes from, or 0.
    pub table: u32,
    /// Its number in the table, or 0.
    pub number: i16,
    /// Its type.
    pub column_type: ColumnType,
    /// The type's modifier, or -1.
    pub modifier: i32,
    /// 0 text, 1 binary.
    pub format: i16,
}

/// A column's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnType {
    /// Number in `pg_type`.
    pub oid: u32,
    /// Bytes of a value, -1 when it varies.
    pub len: i16,
}

impl ColumnType {
    /// `bytea`
    pub const BYTEA: Self = Self { oid: 17, len: -1 };
    /// `int8`
    pub const INT8: Self = Self { oid: 20, len: 8 };
    /// `int4`
    pub const INT4: Self = Self { oid: 23, len: 4 };
    /// `text`
    pub const TEXT: Self = Self { oid: 25, len: -1 };
    /// `oid`
    pub const OID: Self = Self { oid: 26, len: 4 };
    /// `bool`
    pub const BOOL: Self = Self { oid: 16, len: 1 };
}

impl Column {
    /// A column that belongs to no table.
    pub fn new(name: impl Into<String>, column_type: ColumnType) -> Self {
        Self { name: name.into(), table: 0, number: 0, column_type, modifier: -1, format: 0 }
    }

    /// A `text` column.
    pub fn text(name: impl Into<String>) -> Self {
        Self::new(name, ColumnType::TEXT)
    }

    /// An `int4` column.
    pub fn int4(name: impl Into<String>) -> Self {
        Self::new(name, ColumnType::INT4)
    }

    /// An `int8` column.
    pub fn int8(name: impl Into<String>) -> Self {
        Self::new(name, ColumnType::INT8)
    }

    /// A `bytea` column.
    pub fn bytea(name: impl Into<String>) -> Self {
        Self::new(name, ColumnType::BYTEA)
    }

    /// An `oid` column.
    pub fn oid(name: impl Into<String>) -> Self {
        Self::new(name, ColumnType::OID)
    }

    /// A `bool` column.
    pub fn bool(name: impl Into<String>) -> Self {
        Self::new(name, ColumnType::BOOL)
    }

    fn decode(fields: &mut Fields) -> Result<Self, DecodeError> {
        Ok(Self {
            name: fields.text_lossy("column name")?,
            table: fields.u32("table")?,
            number: fields.i16("column number")?,
            column_type: ColumnType { oid: fields.u32("type")?, len: fields.i16("type length")? },
            modifier: fields.i32("type modifier")?,
            format: fields.i16("format")?,
        })
    }

    pub(super) fn write(&self, out: &mut BytesMut) {
        put_text(out, &self.name);
        out.put_u32(self.table);
        out.put_i16(self.number);
        out.put_u32(self.column_type.oid);
        out.put_i16(self.column_type.len);
        out.put_i32(self.modifier);
        out.put_i16(self.format);
    }
}

pub(super) fn decode_columns(body: Bytes) -> Result<Vec<Column>, DecodeError> {
    let mut fields = Fields::of("RowDescription", body);
    let count = fields.count("column count")?;
    let columns = (0..count).map(|_| Column::decode(&mut fields)).collect::<Result<_, _>>()?;
    fields.finish()?;
    Ok(columns)
}

/// A row: one value per column, `None` for NULL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataRow(Vec<Option<Bytes>>);

impl DataRow {
    /// A row of these values.
    pub fn new(values: Vec<Option<Bytes>>) -> Self {
        Self(values)
    }

    pub(super) fn decode(body: Bytes) -> Result<Self, DecodeError> {
        let mut fields = Fields::of("DataRow", body);
        let count = fields.count("column count")?;
        let mut values = Vec::new();
        for _ in 0..count {
            let len = fields.i32("value length")?;
            values.push(match usize::try_from(len) {
                Ok(len) => Some(fields.bytes(len, "value")?),
                Err(_) if len == -1 => None,
                Err(_) => return Err(fields.invalid("value length", len.unsigned_abs())),
            });
        }
        fields.finish()?;
        Ok(Self(values))
    }

    /// Number of columns.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no columns.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A column's value, by its place; `None` for NULL and for a column that is not there.
    pub fn value(&self, column: usize) -> Option<&Bytes> {
        self.0.get(column)?.as_ref()
    }

    /// A column's value as text; `None` also when it is not UTF-8.
    pub fn text(&self, column: usize) -> Option<&str> {
        std::str::from_utf8(self.value(column)?).ok()
    }

    /// All values.
    pub fn values(&self) -> impl ExactSizeIterator<Item = Option<&[u8]>> {
        self.0.iter().map(Option::as_deref)
    }
}
