// Renders a chart as `helm template` does: text/template with sprig, and Helm's own `include` and `toYaml`.
// Usage: render CHART RELEASE <VALUES. Prints the documents as JSON, read as strictly as Kubernetes reads them.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"sigs.k8s.io/yaml"
)

type object = map[string]interface{}

var separator = regexp.MustCompile(`(?:^|\s*\n)---\s*`)

func main() {
	documents, err := render(os.Args[1], os.Args[2])
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(documents)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func render(chart, release string) ([]interface{}, error) {
	values, given, metadata := object{}, object{}, struct{ Name, Version, AppVersion string }{}
	sources := map[string]interface{}{
		filepath.Join(chart, "values.yaml"): &values, filepath.Join(chart, "Chart.yaml"): &metadata, "/dev/stdin": &given,
	}
	for name, into := range sources {
		text, err := os.ReadFile(name)
		if err == nil {
			err = yaml.Unmarshal(text, into)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	merge(values, given)
	scope := object{
		"Values":  values,
		"Chart":   metadata,
		"Release": object{"Name": release, "Namespace": "default", "Service": "Helm"},
	}
	files, err := filepath.Glob(filepath.Join(chart, "templates", "*.*"))
	if err != nil {
		return nil, err
	}
	templates, err := parse(files)
	if err != nil {
		return nil, err
	}
	documents := []interface{}{}
	for _, file := range files {
		if name := filepath.Base(file); strings.HasPrefix(name, "_") || name == "NOTES.txt" {
			continue
		}
		text, err := execute(templates, filepath.Base(file), scope)
		if err != nil {
			return nil, err
		}
		for _, part := range separator.Split(text, -1) {
			var document interface{}
			if err := yaml.UnmarshalStrict([]byte(part), &document); err != nil {
				return nil, fmt.Errorf("%s: %w\n%s", filepath.Base(file), err, part)
			}
			if document != nil {
				documents = append(documents, document)
			}
		}
	}
	return documents, nil
}

// As Helm: mappings are merged, all else is replaced, and null takes a default away.
func merge(defaults, given object) {
	for key, value := range given {
		old, isOld := defaults[key].(object)
		if fresh, isFresh := value.(object); isOld && isFresh {
			merge(old, fresh)
		} else if value == nil {
			delete(defaults, key)
		} else {
			defaults[key] = value
		}
	}
}

func parse(files []string) (*template.Template, error) {
	templates := template.New("chart").Option("missingkey=zero")
	functions := sprig.TxtFuncMap()
	functions["include"] = func(name string, scope interface{}) (string, error) {
		return execute(templates, name, scope)
	}
	functions["toYaml"] = func(value interface{}) (string, error) {
		text, err := yaml.Marshal(value)
		return strings.TrimSuffix(string(text), "\n"), err
	}
	return templates.Funcs(functions).ParseFiles(files...)
}

func execute(templates *template.Template, name string, scope interface{}) (string, error) {
	var text strings.Builder
	err := templates.ExecuteTemplate(&text, name, scope)
	return strings.ReplaceAll(text.String(), "<no value>", ""), err
}
